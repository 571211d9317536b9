"""The machinery: what every value of a jaxpr is, its products, the plan, the interpreter; all that depends on a JAX release."""
