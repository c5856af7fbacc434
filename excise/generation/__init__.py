"""Generation: answers of a model, without computing a token twice.

Here: prompts as tokens, trees of answers, sampling, enumeration, and the cache of completions. Not here: what an answer
is worth (`outcomes`), and under which masks a model is asked (`interventions`).
"""
