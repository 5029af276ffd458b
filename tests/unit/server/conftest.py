from tests.server.conftest import anyio_backend, tokenizer, tokenizer_folder

__all__ = ["anyio_backend", "tokenizer", "tokenizer_folder"]
