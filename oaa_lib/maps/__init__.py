"""Where cumulative maps live: who owns them, how large they are, how they are stored, saved, merged and shared.

Nothing in here knows an accumulator, a fusion or a gate, and nothing imports a module from above this folder.
"""
