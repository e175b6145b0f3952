"""What an answer must look like: a JSON schema, a regular expression, a grammar or one of several texts.

Constraints are compiled against a model's tokenizer by `llguidance`. The gateway compiles each in a
process that it can kill, to refuse what is wrong or too costly; the engine compiles it again and masks
tokens with it.
"""
