"""A recipe is a value: equal ones are equal everywhere, and JSON brings each of them back."""

import json
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysq.calibration.kl import KL
from raysq.calibration.minmax import MinMax
from raysq.calibration.moving_average import MovingAverage
from raysq.calibration.mse import MSE
from raysq.calibration.percentile import Percentile
from raysq.errors import RecipeError
from raysq.recipe import (
    BF16,
    FP32,
    SCHEMA,
    Approach,
    Granularity,
    OpConfig,
    Precision,
    QuantDType,
    Recipe,
    Rounding,
    Scheme,
    TensorConfig,
    Transform,
)

INT8 = OpConfig(Precision.INT8)

percents = st.floats(50, 100, exclude_min=True)
algorithms = st.sampled_from([MinMax(), MovingAverage(), KL(), MSE()]) | st.builds(Percentile, percents)


def tensors(granularities) -> st.SearchStrategy[TensorConfig]:
    return st.builds(
        TensorConfig,
        st.sampled_from(QuantDType),
        st.sampled_from(Scheme),
        st.sampled_from(granularities),
        algorithms,
        st.booleans(),
    )


configs = st.builds(
    OpConfig,
    st.sampled_from(Precision),
    st.sampled_from(Approach),
    tensors([Granularity.PER_TENSOR]),
    tensors(list(Granularity)),
    st.sampled_from(Rounding),
)
alphas = st.floats(0, 1) | st.integers(0, 1)
scales = st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=4).map(tuple)
recipes = st.builds(
    Recipe,
    st.dictionaries(st.text(max_size=8), configs, max_size=4),
    st.dictionaries(st.text(max_size=8), alphas | scales, max_size=3),
    st.lists(st.sampled_from(Transform), unique=True).map(tuple),
)


class TestValue:
    @given(recipes)
    def test_json_brings_it_back(self, recipe):
        assert Recipe.from_json(recipe.to_json()) == recipe

    @given(recipes)
    def test_pickle_brings_it_back(self, recipe):
        again = pickle.loads(pickle.dumps(recipe))
        assert again == recipe
        assert again.to_json() == recipe.to_json()

    @given(recipes, recipes)
    def test_equality_hash_and_digest_agree(self, a, b):
        assert (a == b) == (a.digest == b.digest) == (a.to_json() == b.to_json())
        assert a != b or hash(a) == hash(b)

    @given(recipes)
    def test_the_order_of_ops_and_transforms_does_not_matter(self, recipe):
        ops, smoothing = (dict(reversed(m.items())) for m in (recipe.ops, recipe.smoothing))
        assert Recipe(ops, smoothing, recipe.transforms[::-1]).to_json() == recipe.to_json()

    @pytest.mark.parametrize(("a", "b"), [(1, 1.0), (0.0, -0.0), ((1, 2), (1.0, 2.0))])
    def test_equal_numbers_have_equal_digests(self, a, b):
        assert Recipe({}, {"g": a}).digest == Recipe({}, {"g": b}).digest

    def test_the_digest_is_the_same_in_every_process_and_version(self):
        assert Recipe({"fc": INT8, "head": BF16}, {"g": 0.5}).digest == "b2ba51fd9419f0e8"

    @pytest.mark.parametrize(
        "change",
        [
            {"approach": Approach.DYNAMIC},
            {"activation": replace(INT8.activation, scheme=Scheme.SYMMETRIC)},
            {"activation": replace(INT8.activation, algorithm=Percentile(99.9))},
            {"weight": replace(INT8.weight, granularity=Granularity.PER_TENSOR)},
            {"weight": replace(INT8.weight, reduce_range=True)},
            {"rounding": Rounding.ADAROUND},
            {"precision": Precision.BF16},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_every_field_counts(self, change):
        assert Recipe({"fc": replace(INT8, **change)}) != Recipe({"fc": INT8})

    def test_fields_that_do_not_matter_make_no_difference(self):
        assert Recipe({"fc": replace(INT8, precision=Precision.FP32)}) == Recipe({"fc": FP32})

    def test_is_not_equal_to_anything_else(self):
        assert Recipe({}) != {}

    def test_can_not_be_changed(self):
        recipe = Recipe({"fc": INT8}, {"g": 0.5})
        with pytest.raises(FrozenInstanceError):
            recipe.transforms = ()
        with pytest.raises(TypeError):
            recipe.ops["fc"] = FP32
        with pytest.raises(TypeError):
            recipe.smoothing["g"] = 1.0

    def test_keeps_what_it_was_given_when_that_changes(self):
        ops = {"fc": INT8}
        recipe = Recipe(ops)
        ops["fc"] = FP32
        assert recipe.ops["fc"] == INT8


class TestContent:
    def test_a_call_that_is_not_named_stays_in_fp32(self):
        recipe = Recipe({"fc": INT8})
        assert (recipe.config("fc"), recipe.config("head")) == (INT8, FP32)

    def test_int8_calls(self):
        assert Recipe({"b": INT8, "a": INT8, "c": BF16, "d": FP32}).int8_calls == ("a", "b")

    def test_with_ops_leaves_the_original(self):
        recipe = Recipe({"a": INT8, "b": INT8}, {"g": 0.5}, (Transform.BIAS_CORRECTION,))
        changed = recipe.with_ops({"b": FP32, "c": BF16})
        assert dict(changed.ops) == {"a": INT8, "b": FP32, "c": BF16}
        assert (changed.smoothing, changed.transforms) == (recipe.smoothing, recipe.transforms)
        assert dict(recipe.ops) == {"a": INT8, "b": INT8}

    def test_with_smoothing_replaces_and_with_transform_adds(self):
        recipe = Recipe({"a": INT8}, {"g": 0.5}, (Transform.BIAS_CORRECTION,))
        assert recipe.with_smoothing({"h": 0.25}) == Recipe(recipe.ops, {"h": 0.25}, recipe.transforms)
        assert recipe.with_transform(Transform.EQUALIZATION) == Recipe(recipe.ops, recipe.smoothing, tuple(Transform))

    @pytest.mark.parametrize(
        ("config", "text"),
        [
            (BF16, "bf16"),
            (INT8, "static, x uint8 asym minmax, w int8 per_channel nearest"),
        ],
    )
    def test_a_configuration_reads_in_a_line(self, config, text):
        assert str(config) == text

    def test_transforms_are_kept_in_the_order_of_application(self):
        recipe = Recipe({}, transforms=(Transform.BIAS_CORRECTION, Transform.EQUALIZATION))
        assert recipe.transforms == (Transform.EQUALIZATION, Transform.BIAS_CORRECTION)

    def test_float_calls_are_written_short(self):
        assert Recipe({"fc": BF16}).to_dict()["ops"] == {"fc": {"precision": "bf16"}}

    def test_json_is_on_one_line_or_indented(self):
        recipe = Recipe({"fc": INT8})
        assert recipe.to_json() == json.dumps(recipe.to_dict())
        assert recipe.to_json(indent=2) == json.dumps(recipe.to_dict(), indent=2)

    def test_missing_keys_take_their_defaults(self):
        assert Recipe.from_dict({"ops": {"fc": {"precision": "int8"}}}) == Recipe({"fc": INT8})
        assert Recipe.from_dict({}) == Recipe({})
        assert TensorConfig.from_dict({}) == TensorConfig(QuantDType.U8, Scheme.AFFINE)


def recipe_json(**op) -> str:
    return json.dumps({"ops": {"fc": {"precision": "int8", **op}}})


class TestErrors:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "a recipe must be JSON"),
            ("{", "a recipe must be JSON"),
            ("[" * 100_000, "a recipe must be JSON"),
            ("[]", "a recipe must be an object, got list"),
            ("null", "a recipe must be an object, got NoneType"),
            ('{"op": {}}', "unknown key in a recipe: 'op'.*Did you mean 'ops'"),
            ('{"ops": []}', "`ops` and `smoothing` must be objects"),
            ('{"smoothing": 3}', "`ops` and `smoothing` must be objects"),
            ('{"transforms": "equalization"}', "`transforms` a list"),
            ('{"transforms": ["equalisation"]}', "unknown Transform 'equalisation'.*Did you mean 'equalization'"),
            ('{"transforms": ["equalization", "equalization"]}', "each transform may stand once"),
            ('{"ops": {"fc": "int8"}}', "a call's configuration must be an object, got str"),
            ('{"ops": {"fc": {}}}', "unknown Precision None"),
            ('{"ops": {"fc": {"precision": "int4"}}}', "unknown Precision 'int4'.*Did you mean 'int8'"),
            (recipe_json(aproach="static"), "unknown key in a call's configuration: 'aproach'.*'approach'"),
            (recipe_json(approach="qat"), "unknown Approach 'qat'; known are dynamic, static, weight_only"),
            (recipe_json(rounding="up"), "unknown Rounding 'up'"),
            (recipe_json(activation=[]), "a tensor configuration must be an object, got list"),
            (recipe_json(activation={"dtype": "int4"}), "unknown QuantDType 'int4'"),
            (recipe_json(activation={"scheme": "affine"}), "unknown Scheme 'affine'; known are asym, sym"),
            (recipe_json(activation={"bits": 8}), "unknown key in a tensor configuration: 'bits'"),
            (recipe_json(activation={"granularity": "per_channel"}), "activations are quantized per tensor"),
            (recipe_json(activation={"reduce_range": 1}), "`reduce_range` must be true or false, got 1"),
            (recipe_json(activation={"algorithm": "minmx"}), "Did you mean 'minmax'"),
            (recipe_json(weight={"algorithm": "percentile(5)"}), r"in \(50, 100\], got 5"),
            ('{"smoothing": {"g": 1.5}}', r"alpha of 'g' must lie in \[0, 1\], got 1.5"),
            ('{"smoothing": {"g": NaN}}', r"alpha of 'g' must lie in \[0, 1\], got nan"),
            ('{"smoothing": {"g": true}}', "must be an alpha or a list of scales, got True"),
            ('{"smoothing": {"g": "auto"}}', "must be an alpha or a list of scales, got 'auto'"),
            ('{"smoothing": {"g": []}}', "must be an alpha or a list of scales"),
            ('{"smoothing": {"g": [1, "2"]}}', "must be an alpha or a list of scales"),
            ('{"smoothing": {"g": [1, 0]}}', "scales of 'g' must be positive and finite"),
            ('{"smoothing": {"g": [Infinity]}}', "scales of 'g' must be positive and finite"),
            (f'{{"schema": {SCHEMA + 1}}}', f"schema must be at most {SCHEMA}, got {SCHEMA + 1}. Update raysq"),
            ('{"schema": "one"}', f"schema must be at most {SCHEMA}, got 'one'"),
        ],
    )
    def test_malformed_json(self, text, message):
        with pytest.raises(RecipeError, match=message):
            Recipe.from_json(text)
