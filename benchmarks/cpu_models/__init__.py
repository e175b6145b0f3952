"""Whole models on CPUs: our engine beside llama.cpp, OpenVINO and transformers; see __main__.py."""
