"""Entry points: tables of contents."""
