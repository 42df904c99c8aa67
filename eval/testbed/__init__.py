"""A small trained Llama checkpoint and its tokenizer, for a first run and for the tests, without a network."""
