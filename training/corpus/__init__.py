"""The training corpus of the bundled model: questions and answers about the Python standard library."""
