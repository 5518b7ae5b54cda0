"""The JSON API, shared by client and service: models, hyperparameters and their validation."""
