"""The accuracy ladder: what each way of storing K and V does to a model's predictions, measured offline.

Methods of this package go through the real operators, bit for bit; comparators are emulated on the same attention.
"""
