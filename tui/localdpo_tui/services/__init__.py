"""What the UI does, without a UI: the model host, the trainer, the workspace and its history."""
