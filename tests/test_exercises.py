"Every exercise has a hint that unfolds and a solution of its own, and every solution leads back to its chapter"
import json, re, sys
from itertools import dropwhile, islice, takewhile
from pathlib import Path
import pytest

NBS = Path(__file__).parents[1]/'nbs'
sys.path.insert(0, str(NBS.parent/'tools'))
from thumbs import page

def source(cell): return ''.join(cell['source'])
def cells(path): return json.loads(path.read_text())['cells']
def markdown(path): return [source(c) for c in cells(path) if c['cell_type']=='markdown']

PAGES = sorted(NBS.glob('*_solutions_*.ipynb'))
TRY = {p.stem: next(c for c in markdown(p) if re.search('^## Try this$', c, re.M)) for p in sorted(NBS.glob('*.ipynb'))
       if p not in PAGES and any(re.search('^## Try this$', c, re.M) for c in markdown(p))}

def exercises(cell):
    "The items of a list of exercises, each with what is indented below it"
    section = re.search(r'^## Try this\n(.*?)(?=^#|\Z)', cell, re.M|re.S)[1]
    return re.findall(r'^(?:- |\d+\. ).*\n?(?:(?:[ \t].*)?(?:\n|\Z))*?(?=^\S|\Z)', section, re.M)

def solutions(page): return {h: c for c in markdown(page) for h in re.findall(r'^### (.+)$', c, re.M)}

def body(page, heading):
    "The cells of a solution: from its heading to the next"
    after = dropwhile(lambda c: not source(c).startswith(f'### {heading}\n'), cells(page))
    return list(takewhile(lambda c: not re.match('##+ ', source(c)), islice(after, 1, None)))

def anchors(page):
    "Headings as anchors that JupyterLab and the website make alike: small letters, digits and spaces"
    return {h.replace(' ', '-') for h in solutions(page)}

def test_there_are_exercises_and_solutions(): assert len(TRY)>=20 and PAGES

@pytest.mark.parametrize('chapter', TRY)
def test_every_exercise_has_a_hint_and_a_solution(chapter):
    items = exercises(TRY[chapter])
    assert items
    for i,item in enumerate(items, 1):
        name = page(chapter).replace('_', '-')
        hint = re.search(r'\n\s*<details><summary>Hint</summary>\n\n(.+?)\n\n\s*\[Solution\]\((\S+\.ipynb)#(\S+)\)\n\n\s*</details>', item, re.S)
        assert hint, f'{chapter}: exercise {i} lacks a hint or a link to a solution: {item[:80]}'
        assert hint[3]==f'{name}-{i}' and hint[3] in anchors(NBS/hint[2]), f'{chapter}: exercise {i} links to {hint[2]}#{hint[3]}, which is not there'

def test_headings_of_solutions_are_unique_and_make_the_same_anchor_everywhere():
    heads = [h for p in PAGES for c in markdown(p) for h in re.findall(r'^### (.+)$', c, re.M)]
    assert len(heads)==len(set(heads)) and [h for h in heads if not re.fullmatch('[a-z0-9 ]+', h)]==[]

@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_every_solution_leads_back_and_says_what_is_seen(page):
    for heading,text in solutions(page).items():
        back = re.search(r'\[To the exercise\]\((\S+)\.ipynb#exercises\)', text)
        assert back and '<a id="exercises"></a>' in TRY[back[1]], f'{page.stem}: {heading} does not lead back'
        assert text.split('\n> ')[1].split('\n')[0] in TRY[back[1]], f'{page.stem}: {heading} quotes another exercise than {back[1]} asks'
        *steps,last = body(page, heading)
        assert re.search(r'\bassert\b|\btest_\w+\(', '\n'.join(source(c) for c in steps if c['cell_type']=='code')), f'{page.stem}: {heading} tests nothing'
        assert last['cell_type']=='markdown' and len(source(last))>80, f'{page.stem}: {heading} ends without a word'
