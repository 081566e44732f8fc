"""The table of the fault bench, its figures and its README."""


def write_report(*a):
    pass
