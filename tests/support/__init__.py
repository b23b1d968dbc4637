"""What tests and benches share: cases, shapes, formulas, compilers for kernels. Imports no test file and no bench."""
