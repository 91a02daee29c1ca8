"""What the command line shows and reads. Never imported by the library's other packages."""
