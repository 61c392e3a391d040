"""In the source tree the Triton kernels lie in the top-level ``kernels`` folder; an installed nasdet holds them here."""

__path__.append(__file__.rsplit("/nasdet/", 1)[0] + "/kernels")
