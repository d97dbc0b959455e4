"""Branches out for good: which ones, what stays of their blocks, and what they were worth."""
