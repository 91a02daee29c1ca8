"""Dialogs and flows that lie on top of a place."""
