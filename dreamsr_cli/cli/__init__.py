"""What the user types: thin commands that parse, build a config, call the engine and print. No torch at import time."""
