"""Saved regressors: folders in the Hugging Face format, and repositories of the Hub."""
