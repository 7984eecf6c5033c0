"""A convolutional net: the demo, whose code is in raysq/demo.py. Run: python examples/digits_cnn.py."""

from raysq import demo

if __name__ == "__main__":
    raise SystemExit(demo.main())
