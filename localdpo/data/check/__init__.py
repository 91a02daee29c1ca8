"""What is wrong with a file of pairs, found before it is trained on."""
