"""Checkpoints of llama.cpp, brought into the layout of Hugging Face."""
