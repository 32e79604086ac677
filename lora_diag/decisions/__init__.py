"""Commands that plan, choose, extract, recover or check adapters, one package each; targets and
trainers' settings.
"""
