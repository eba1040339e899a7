"The website builds without Quarto, its links lead somewhere, and its pages need nothing from elsewhere"
import json, re, sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'tools'))
from linkcheck import check
from thumbs import page

CHAPTERS = sorted(p.stem for p in (ROOT/'nbs').glob('*.ipynb'))

def test_every_notebook_has_a_page(site):
    assert [s for s in CHAPTERS if not (site/f'{page(s)}.html').exists()]==[]

def test_links_lead_somewhere_and_nothing_comes_from_outside(site):
    bad,_ = check(site)
    assert bad==[]

def test_sidebar_is_in_reading_order(site):
    html = (site/'index.html').read_text()
    nav = html[html.index('id="quarto-sidebar"'):html.index('<main')]
    there = [Path(h).stem for h in re.findall(r'href="([\w.-]+\.html)"', nav)]
    assert there==['index'] + [page(s) for s in CHAPTERS if s!='index']
    parts = re.findall('<span class="sidebar-part">(.*?)</span>', nav)
    assert parts[:4]==['Ground', 'Methods', 'What they learn', 'At scale']

def test_exported_code_is_part_of_the_text(site):
    words = re.sub(r'<[^>]+>', '', (site/'masks.html').read_text())
    for name in ('def block_mask(', 'def _draw_boxes('): assert name in words
    assert 'id="block_mask"' in (site/'masks.html').read_text()

def test_headings_leave_no_level_out(site):
    for p in site.glob('*.html'):
        levels = [1] + [int(h) for h in re.findall(r'<h([1-6])[ >]', p.read_text().partition('</header>')[2])]
        assert all(b<=a+1 for a,b in zip(levels, levels[1:])), p.name

def test_search_index_has_every_page_and_symbol(site):
    there = {e['href'] for e in json.loads((site/'search.json').read_text())}
    assert {h.partition('#')[0] for h in there} >= {f'{page(s)}.html' for s in CHAPTERS if s!='index'}
    assert {'masks.html#block_mask', 'checkpoints.html#load_official', 'patches.html#patchify'} <= there

def test_stylesheets_load_nothing_from_outside(site):
    urls = [u for css in site.rglob('*.css') for u in re.findall(r'(?:@import|url\()\s*["\']?(https?://[^"\')\s]+)', css.read_text())]
    assert urls==[]

def test_maths_is_typeset_from_beside_the_pages(site):
    assert 'katex/katex.min.js' in (site/'masks.html').read_text()
    assert list((site/'katex'/'fonts').glob('*.woff2'))

def test_linkcheck_finds_what_is_broken(tmp_path):
    (tmp_path/'a.html').write_text('<p id="x"><a href="#y"></a><a href="b.html"></a><a href="/a.html"></a><a href="a.html#x"></a><img src="https://example.com/i.png">')
    assert sorted(why.split(':')[0] for _,_,why in check(tmp_path)[0])==['absolute', 'loaded from outside', 'missing', 'no such anchor']
