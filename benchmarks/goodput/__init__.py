"""Goodput under kills: which share of the pushes that workers compute is in the final weights."""
