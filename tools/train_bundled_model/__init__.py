"""The making of models/llama4-mini: texts, tokenizer, training, export. The engine itself never imports it."""
