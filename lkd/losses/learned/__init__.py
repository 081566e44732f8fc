"""The loss networks: two forms over logits, one over features, their sum, and its file.

*Our reconstruction*: we could not read the text of LKD (Ran, Huang, Yang, PLOS ONE 2025), and found no code.
"""
