"""The server: text, HTTP, people and storage. It never imports torch."""

__version__ = "0.1.0"
