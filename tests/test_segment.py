"""Words where a script puts no spaces between them: the Chinese sentences were written for this test."""

from hypothesis import given
from hypothesis import strategies as st

from llmprod import data, segment
from llmprod.customer_service.desk import SENTENCE_END
from llmprod.evaluate import baselines

GOOD = ["这本书很好看", "服务很好下次再来", "质量好发货快", "很好用推荐购买", "孩子说很好玩", "味道很好价格便宜"]
BAD = ["这本书太差了", "服务太差再也不来", "质量太差发货慢", "难用太差后悔购买", "孩子说太差劲", "味道太差价格贵"]


def test_words_and_pairs_of_mixed_text():
    assert segment.words("我的iPhone 坏了，怎么退?") == ["我", "的", "iPhone", "坏", "了", "，", "怎", "么", "退", "?"]
    assert segment.pairs("退货政策 30 days 书").split() == ["退货", "货政", "政策", "30", "days", "书"]
    assert segment.pairs("カメラを買う").split()[:2] == ["カメ", "メラ"]


@given(st.text(st.characters(max_codepoint=0x2FFF)))
def test_texts_of_other_scripts_stay_as_they_are(text):
    assert segment.pairs(text) == text and segment.words(text) == text.split()


@given(st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), min_size=2))
def test_pairs_cover_a_run_and_no_character_is_lost(text):
    found = segment.pairs(text).split()
    assert len(found) == len(text) - 1 and found[0] + "".join(pair[1] for pair in found[1:]) == text
    assert "".join(segment.words(text)) == text


def test_a_bag_of_words_learns_what_chinese_texts_share():
    """No two of these sentences are equal, so whoever takes each for one word learns nothing."""
    model = baselines.bag_of_words(GOOD[:5] + BAD[:5], [1] * 5 + [0] * 5, c=10)
    assert model.predict([GOOD[5], BAD[5]]).tolist() == [1, 0]


def test_near_duplicates_of_chinese_texts_are_found():
    text = "我在上个月买了这台相机，用了两个星期以后觉得画质非常好，电池也很耐用，就是有一点重，不过可以接受。"
    edited = text.replace("两个星期", "三个星期")
    assert data.near_duplicates([text, GOOD[0], edited], 0.7)[["a", "b"]].to_numpy().tolist() == [[0, 2]]


def test_chinese_sentences_end_without_a_space():
    text = "七天内可以退货。“真的吗？”可以！Yes. It is."
    assert [part for part in SENTENCE_END.split(text) if part] == [
        "七天内可以退货。",
        "“真的吗？”可以！",
        "Yes.",
        "It is.",
    ]
