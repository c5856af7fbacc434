"""Generation: answers of a model, without computing a token twice.

Here: trees of answers, sampling, enumeration, and the cache of completions. Not here: prompts as tokens (`models`),
what an answer is worth (`outcomes`), and under which masks a model is asked (`interventions`).
"""
