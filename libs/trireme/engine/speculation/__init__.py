"""Drafted tokens: who proposes them, how they are verified, what is learnt of both.

Invariant: a draft decides when a token comes, never which. Each position's token is chosen by the request's
own sampling from the target's scores; a drafted token is kept if it is that token (the match rule), so the
answer is the one that plain decoding gives, draw by draw, whoever drafted and however badly.
"""
