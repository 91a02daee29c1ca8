"""Readers of other tools' files: containers (JSON Lines, JSON, CSV, Parquet) and the families of rows in them."""
