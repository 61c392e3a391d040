"""In the source tree the Triton kernels lie in the top-level folder ``kernels``; installed they lie here."""

__path__.append(__file__.rsplit("/nasdet/", 1)[0] + "/kernels")
