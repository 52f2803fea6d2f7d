"""What only some sites use: each module is imported when a setting or a command asks for it."""
