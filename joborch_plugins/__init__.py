"""What only some sites or commands use: each module here is imported only when asked for."""
