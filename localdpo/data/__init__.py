"""Preference pairs: read from files, split, and turned into token ids."""
