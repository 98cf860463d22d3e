"""The Hugging Face hub: rows of datasets, tokenizers by name, the special tokens of a folder.

The libraries wait and retry for minutes if the hub is unreachable, so one short request precedes
them (availability.py). If it gets no answer, the copy that an earlier run downloaded is used; if
the hub refuses, a UserError says why (messages.py). No code from the hub is ever executed.
"""
