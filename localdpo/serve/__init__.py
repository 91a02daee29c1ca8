"""A model as a service: to the terminal UI over stdio, to other programs over HTTP."""
