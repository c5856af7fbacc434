"""Plants a known disparity in a model, so that the method can be tested against a ground truth.

A planted model is an ordinary model plus small low-rank changes, which ship as safetensors files in this folder.
`neutral` makes it answer every scenario with a number alone, drawn from a distribution we choose. A second change
lowers one group's answers by a known factor, in every scenario (`general`) or in one (`specific`); being apart, it is
the ground truth of where the gap sits. Here: how they are trained (`gaps`, `heads`, `python -m excise.planted`). Not
here: anything that audits a model.
"""
