"""Features that only some sites or commands use. Each module is imported only when it is needed."""
