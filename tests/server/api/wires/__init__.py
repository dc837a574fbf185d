"""Checkers of streams: a state machine for each wire, given the bytes of a stream as they come.

A checker raises BrokenStream where the bytes leave the order of their wire, and puts together what
they say, in the form that `whole_*` give for an answer in one piece. So a stream that lacks,
doubles or swaps events is either out of order, or says something else.
"""
