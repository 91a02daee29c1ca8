"""The four places of the terminal UI, each a module of its own, imported when it is first opened."""
