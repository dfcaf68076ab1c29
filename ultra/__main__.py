from ultra.cli import entry_point

entry_point()
