"""The race against synchronous training: the loss over time by freestep and by torch's DDP, in worlds good and bad."""
