"""A small network for the campaign of faults; importing it loads TensorFlow."""

import keras

from stellar_lab.network import Network


class Small(Network):
    "Two layers."

    def _build(self, n_pixels, n_labels):
        layers = [keras.Input((n_pixels,)), keras.layers.Dense(8), keras.layers.Dense(n_labels)]
        return keras.Sequential(layers)
