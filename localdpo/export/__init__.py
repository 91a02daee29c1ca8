"""A trained adapter in the forms other tools read, and theirs in ours."""
