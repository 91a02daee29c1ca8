"""Models on this machine: found, checked, loaded, adapted, and asked for text."""
