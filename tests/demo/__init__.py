"""The demo: its file, its ground, its proof, and whole runs."""
