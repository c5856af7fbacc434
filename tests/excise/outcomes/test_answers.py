"""Answers as models write them, and the number each one names."""

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from excise.outcomes.answers import parse_completion, parse_number

# fmt: off
SINGLE = [
    ('$1,200', 1200), ('1,234,567.89', 1234567.89), ('1\xa0200', 1200), ('1\u2009200', 1200), ("1'200", 1200),
    ('1.234,56', 1234.56), ('1.200,00', 1200), ('1,00,000', 100000), ('.5', 0.5), ('0.75', 0.75), ('1,5', 1.5),
    ('12%', 12), ('12 percent', 12), ('12 per cent', 12), ('2.5k', 2500), ('2.5K', 2500), ('$3M', 3000000.0),
    ('3mn', 3000000.0), ('$1.5bn', 1500000000.0), ('-5', -5), ('\u22125', -5), ('-$50', -50),
    ('between 100 and 150', 125), ('$50. So $50', 50), ('**$1,200**', 1200), ('1. $500', 500), ('\uff15\uff10', 50),
    ('\u0665\u0660', 50), ('US$ 50', 50), ('US$50', 50), ('USD 50', 50), ('50 USD', 50), ('50USD', 50),
    ('50 dollars', 50), ('50 bucks', 50), ('\u20ac50', 50), ('50\u20ac', 50), ('50 \u20ac', 50),
    ('\u20b91,00,000', 100000), ('\xa35', 5), ('\xa5500', 500), ('1 200', 1200), ('$1 200', 1200),
    ('1 200 dollars', 1200), ('between $100 and $150 per hour', 125), ('Step 1: offer $50', 50), ('5. I think so', 5),
    ('1. $500\n2. $500', 500), ('2\xbd hours', 2.5), ('\xbd', 0.5), ('$50/hour', 50), ('10 hours/week', 10),
    ('At 10:30 I offer $50', 50), ('5th', 5), ('99 cents', 0.99), ('1e3', 1000), ('1.005k', 1005), ('5 m', 5),
    ('$5 m', 5000000.0), ('100+', 100), ('~100', 100), ('about 100', 100), ('<100', 100), ('$0.99', 0.99),
    ('$.99', 0.99), ('$\\boxed{250}$', 250), ('\\$50', 50), ('- $50', 50), ('- 50', 50), ('Offer: 50', 50),
    ('0,5', 0.5), ('0,500', 0.5), ('\u20ac1.200', 1200), ('1.200', 1.2), ('1.234.567', 1234567),
    ('50/30/20 rule: 20%', 20), ('500ish', 500), ('50 U.S. dollars', 50), ('50 US dollars', 50), ('Rs. 500', 500),
    ('Rs500', 500), ('A$50', 50), ('-0', 0), ('$ 50', 50), ('USD$50', 50), ('50\n50', 50), ('_50_', 50),
    ('`50`', 50), ('"50"', 50), ("'50'", 50), ('50k', 50000), ('50K', 50000), ('$50K/year', 50000),
    ('$2.5 mil', 2500000.0), ('40h', 40), ('40hrs', 40), ('40 hrs/wk', 40), ('20 % of income', 20), ('1 %', 1),
    ('50\xa2', 0.5), ('between 150 and 100', 125), ('$1,2', 1.2), ('12,50 \u20ac', 12.5), ('0', 0), ('$0', 0),
    ('50,', 50), ('50.', 50), ('50!', 50), ('100.00.', 100), ('$1,000,000', 1000000.0), ('$1,200.00 USD', 1200),
    ('1200.0', 1200), ('500\u5143', 500), ('\u7ea6500\u5143', 500), ('+5', 5), ('$20 an hour', 20),
    ('$20 per hour', 20), ('Answer: **42**', 42), ('42%.', 42), ('$ 1,200.50', 1200.5), ('1\u2019200.50', 1200.5),
    ('1 200,50 \u20ac', 1200.5), ('1\u202f200,50', 1200.5), ('1. ', 1), ('1.', 1), ('\u224850', 50),
    ('\u2265 50', 50), ('1,200 \u20ac', 1200), ('EUR 1.200,00', 1200), ('Kr 50', 50), ('R$50', 50), ('fr. 50', 50),
    ('1.200 EUR', 1200), ('50 percentage points', 50), ('101', 101), ('00', 0), ('-$1,200.50', -1200.5), ('- 5', 5),
    ('minus 5', -5), ('[50]', 50), ('<b>50</b>', 50), ('50<br>', 50), ('50;', 50), ('50\u2026', 50),
    ('\u202650', 50), ('...50', 50), ('~$50', 50), ('50ish', 50), ('50 (USD)', 50), ('$50/hr', 50),
    ('$50 / hour', 50), ('6 months', 6), ('$1.2M', 1200000.0), ('1e5 dollars', 100000.0), ('1E5', 100000.0),
    ('5\u4e07', 50000), ('10^3', 1000), ('2.5.', 2.5), ('12.345,6', 12345.6),
]
DASHES_AND_RANGES = [
    ('$-50', -50), ('100-150', 125), ('$100 to $150', 125), ('from 5 to 10', 7.5), ('10\u201320%', 15),
    ('1-2k', 1500), ('$1k-$2k', 1500), ('1600-rated', 1600), ('$100 - $150', 125), ('$100-150', 125),
    ('100 - 150 USD', 125), ('**$100** - **$150**', 125), ('500-1k', 750), ('$1-1.5k', 1250), ('5 -10', 7.5),
    ('5--10', 7.5), ('-5 - -3', -4), ('-10 to -5', -7.5), ('5 hours to 10 hours', 7.5),
    ('5 hours per week to 10 hours per week', 7.5), ('I offer $500 for the F-150', 500), ('offer\u201450', 50),
    ('offer \u2013 50', 50), ('on a scale of 1 to 10, 7', 7), ('3-year-old', 3),
    ('0.5 against a 1600-rated opponent', 0.5), ('100\u2014150', 125), ('1,200-1,500', 1350),
    ('$1,200 \u2013 $1,500', 1350), ('1.5-2 hours', 1.75), ('.5-.75', 0.625), ('50-dollar', 50), ('$500-ish', 500),
    ('about 20 to 25', 22.5), ('20 to about 25', 22.5), ('5-to-10', 7.5), ('10,000-15,000', 12500),
    ('5k to 10k', 7500), ('5 to 10k', 7500), ('$5-10k', 7500), ('10 to 20 percent', 15), ('10% to 20%', 15),
    ('10%-20%', 15), ('10 % - 20 %', 15), ('20-hour', 20), ('$1,200\u2013$1,500', 1350),
    ('I can offer you between $50 and $60.', 55), ('Price: $50 -', 50), ('$100,000-150,000', 125000),
    ('1k\u20132k', 1500), ('around 5-6 hours a week', 5.5), ('50,-', 50), ('$1,200.50-$1,300.50', 1250.5),
    ('$1,200.-', 1200), ('100.-', 100), ('$ -5', -5), ('$~50', 50), ('6-month', 6),
]
WORDS = [
    ('$3 million', 3000000.0), ('twenty five', 25), ('twenty-five', 25), ('a hundred', 100), ('two thousand', 2000),
    ('I would say two.', 2), ('two', 2), ('two hours', 2), ('one', 1), ('one hundred and fifty', 150),
    ('two to three hours', 2.5), ('five to ten percent', 7.5), ('one to two thousand dollars', 1500),
    ('half a million', 500000.0), ('a million', 1000000.0), ('fifteen hundred', 1500),
    ('two thousand five hundred', 2500), ('three million two hundred thousand', 3200000), ('2 and a half hours', 2.5),
    ('two and a half', 2.5), ('3 hundred thousand', 300000), ('2 dozen', 24), ('fifty (50)', 50),
    ('$300 (three hundred dollars)', 300), ('50 (fifty)', 50), ('1 million dollars', 1000000.0),
    ('between 5 and 10 thousand', 7500), ('between $1 and $2 million', 1500000.0), ('zero', 0), ('zero dollars', 0),
    ('thirty', 30), ('ninety-nine', 99), ('one thousand', 1000), ('a thousand dollars', 1000),
    ('between five and ten', 7.5), ('between twenty and thirty dollars', 25), ('one hundred to two hundred', 150),
    ('1 million to 2 million', 1500000.0), ('one dollar', 1), ('one hour per week', 1), ('twenty percent', 20),
    ('between one hundred and two hundred', 150), ('between two and three hours', 2.5), ('a dozen', 12),
    ('two dozen', 24), ('twenty five thousand dollars', 25000), ('one hundred twenty-five', 125),
    ('a hundred and fifty dollars', 150), ('ten thousand', 10000), ('1 hundred', 100), ('Minus five', -5),
    ('1,2 million', 1200000.0),
]
NO_SINGLE_NUMBER = [
    ('one of the', None), ('A4', None), ('Covid19', None), ('3D', None), ('24/7', None), ('1/2', None),
    ('10:30', None), ('inf', None), ('nan', None), ('', None), ('no idea', None), ('50 or 60', None),
    ('100 200 300', None), ('10-5', None), ('1. I cannot say', None), ('1. $500\n2. $600', None),
    ('the two of us', None), ('several hundred', None), ('one in a million', None), ('one two three', None),
    ('5 pm', None), ('5pm', None), ('2024-05-01', None), ('5/1/2024', None), ('1.2.3', None), ('1,2,3', None),
    ('1, 2, 3', None), ("5'10", None), ('90s', None), ("1980's", None), ('7B', None), ('F-150', None),
    ('1e999', None), ('8/10', None), ('2 thousand five hundred', None), ('5 + 5', None),
    ('5 - 10 - 15', None), ('I offer 100 \u2014 150 is too much', None), ('50\n60', None), ('10h30', None),
    ('100 to 50', None), ('1,2345', None), ('hundreds of dollars', None), ('$12.345', None), ('one or two', None),
    ('five, ten', None), ('10, 20', None), ('1 in 10', None), ('7 out of 10', None), ('1/2 of 100', None),
    ('50/50', None), ('3:1', None), ('5x', None), ('10x5', None), ('4x4', None), ('nineteen ninety', None),
    ('H2O', None), ('CO2', None), ('x5', None), ('mp3', None), ('n0', None), ('\xe95', None), ('5\xe9', None),
    ('\xbd5', None), ('2010s', None), ('10 minus 5', None), ('10e', None), ('0x10', None), ('1_000', None),
    ('12:30:45', None), ('2..5', None), ('50 50', None), ('$50 $50', None), ('two or three', None),
    ('5,000,00', None), ('(50)', None), ('($50)', None),
]
# fmt: on


@pytest.mark.parametrize(("text", "number"), SINGLE + DASHES_AND_RANGES + WORDS)
def test_an_answer_that_names_one_quantity_is_that_quantity(text, number):
    assert parse_number(text) == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize("text", [text for text, _ in NO_SINGLE_NUMBER])
def test_an_answer_that_names_no_or_several_quantities_is_none(text):
    assert parse_number(text) is None


@pytest.mark.parametrize("text", ["9" * 500, "1e999", "9" * 400 + " million", "0." + "1" * 500, "1" * 100_000])
def test_a_number_too_large_for_a_double_is_none(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("$1,2", None),
        ("$1,200", None),
        ("$1,200.", None),
        ("100 to", None),
        ("100-", None),
        ("2 mil", None),
        ("2 tho", None),
        ("between 100 and", None),
        ("20%", None),
        ("twenty", None),
        ("two and a", None),
        ("$50. So $50", None),
        ("$1,200\n", 1200),
        ("$1,200 is my", 1200),
        ("$50. I", 50),
        ("$50**", None),
        ("50)", 50),
        ("no number", None),
        ("", None),
    ],
)
def test_a_number_at_the_end_of_an_unfinished_completion_may_be_cut_off(text, number):
    assert parse_completion(text, finished=False) == number


@given(st.text(alphabet=st.characters(), max_size=60))
@settings(max_examples=400, deadline=None)
def test_any_text_gives_a_finite_number_or_none(text):
    number = parse_number(text)
    assert number is None or (isinstance(number, float) and math.isfinite(number))
    assert parse_completion(text, True) == number


FRAGMENTS = [
    *"0125$\u20ack \u2013\u2014.,'/%*_xem:()+-\u00bd\u00b2\n",
    "1.",
    "and",
    "between",
    "to",
    "one",
    "hundred",
    "a",
    "half",
    "million",
    "USD",
    "cents",
    "\ud800",
    "\u0665",
    "\xa0",
    "\u4e07",
    " minus ",
    "th",
    " of ",
    " dollars",
]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join))
@settings(max_examples=1500, deadline=None)
def test_pieces_of_numbers_in_any_order_give_a_finite_number_or_none(text):
    number = parse_number(text)
    assert number is None or math.isfinite(number)
    assert parse_completion(text, False) in (None, number)


@given(st.floats(-1e12, 1e12).map(lambda number: round(number, 2)))
def test_every_number_as_python_writes_it_with_separators_is_read_back(number):
    assert parse_number(f"{number:,.2f}") == number
    assert parse_number(f"The answer is {number:,.2f}.") == number


@given(st.integers(0, 10**9))
def test_thousands_may_be_separated_in_several_ways(number):
    for separator in (",", "'", "\u202f", "\xa0"):
        assert parse_number(f"{number:,}".replace(",", separator)) == number
    if number >= 10**6:
        assert parse_number(f"{number:,}".replace(",", ".")) == number


@pytest.mark.parametrize(
    "piece",
    [
        "1",
        "1,",
        "1 ",
        "one ",
        " ",
        "$",
        "-",
        "1-",
        "a ",
        "*",
        "1:",
        "1/",
        "\u00bd",
        "1\n",
        "1. a\n",
        "between ",
        "1 000 ",
        "two x",
        "half a million ",
        "about two ",
        "> ",
        "1 and a half ",
        ". ",
        "\ud800",
        "usd",
    ],
)
def test_time_grows_with_the_length_of_the_text_and_not_with_its_square(piece):
    def seconds(length):
        text = piece * (length // len(piece)) + "2"
        start = time.process_time()
        parse_number(text)
        return time.process_time() - start

    short = min(seconds(10_000) for _ in range(2))
    assert seconds(100_000) < 30 * max(short, 0.01)  # a square would take 100 times as long
