"""Who may do what: the tokens of the service, where they are kept, and the log of what was done and refused."""
