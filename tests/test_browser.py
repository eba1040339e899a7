"The site in a real browser: what a reader sees, hears, clicks and looks for"
import functools, subprocess, sys, threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'tools'))
from npm import npm_pack

AXE = 'axe-core@4.14.1'
DESK,PHONE = dict(width=1300, height=900),dict(width=375, height=800)

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope='module')
def address(site):
    "Where the site is served, on this machine only"
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}/'
    server.shutdown()

@pytest.fixture(scope='module')
def context(browser, address):
    "A window that asks nobody but our server, and may use the clipboard"
    context = browser.new_context(viewport=DESK, color_scheme='light')
    context.grant_permissions(['clipboard-read', 'clipboard-write'], origin=address)
    yield context
    context.close()

@pytest.fixture(scope='module')
def tab(context):
    page = context.new_page(); page.set_default_timeout(20_000)
    return page

@pytest.fixture(scope='module')
def axe(tmp_path_factory):
    "The code of axe-core, from npm, which keeps what it fetched once"
    try: return (npm_pack(AXE, tmp_path_factory.mktemp('axe'))/'axe.min.js').read_text()
    except (OSError, subprocess.SubprocessError) as e: pytest.skip(f'`npm pack {AXE}` failed: {type(e).__name__}')

VISIT = """async () => {
    const images = [...document.images], decoded = await Promise.allSettled(images.map(i => { i.loading = 'eager'; return i.decode() }))
    return {maths: document.querySelectorAll('.math').length, typeset: document.querySelectorAll('.math .katex').length,
        wrong: document.querySelectorAll('.katex-error').length, broken: decoded.filter(d => d.status == 'rejected').length,
        silent: images.filter(i => !i.alt.trim()).map(i => i.closest('.cell')?.id || i.src.slice(0, 60))} }"""

@pytest.fixture(scope='module')
def visits(site, address, tab):
    "What every page asks for, complains about and shows, and how wide it is on a phone"
    seen,complaints,asked = {},[],[]
    tab.on('console', lambda m: complaints.append((tab.url, m.text)) if m.type in ('error', 'warning') else None)
    tab.on('pageerror', lambda e: complaints.append((tab.url, str(e))))
    tab.on('request', lambda r: asked.append(r.url))
    for p in sorted(site.glob('*.html')):
        tab.goto(address+p.name, wait_until='load')
        seen[p.name] = tab.evaluate(VISIT)
        tab.set_viewport_size(PHONE)
        seen[p.name]['width'] = tab.evaluate('document.documentElement.scrollWidth')
        tab.set_viewport_size(DESK)
    return dict(pages=seen, complaints=complaints, asked=asked)

def pages_where(visits, bad): return {name: v for name,v in visits['pages'].items() if bad(v)}

def test_pages_complain_of_nothing(visits): assert visits['complaints']==[]

def test_no_request_leaves_the_machine(visits, address):
    assert {u[:60] for u in visits['asked'] if not u.startswith((address, 'data:', 'blob:'))}==set()

def test_maths_is_typeset(visits):
    assert pages_where(visits, lambda v: v['wrong'] or v['typeset']!=v['maths'])=={}
    assert visits['pages']['patches.html']['typeset']>10

def test_images_can_be_heard(visits):
    assert {name: v['silent'] for name,v in pages_where(visits, lambda v: v['silent']).items()}=={}

def test_images_are_there(visits): assert pages_where(visits, lambda v: v['broken'])=={}

def test_phones_scroll_down_only(visits):
    assert {name: v['width'] for name,v in pages_where(visits, lambda v: v['width']>PHONE['width']).items()}=={}

CHECK = """async rules => (await axe.run(document, {resultTypes: ['violations'], ...(rules ? {runOnly: rules} : {})})).violations
    .map(v => [v.id, v.help, v.nodes.slice(0, 3).map(n => n.target.join(' '))])"""
WHOLE = 'masks.html'              # code is alike everywhere and makes most of a page: axe reads its colours here only
PLAIN = "() => document.querySelectorAll('pre code').forEach(e => { e.textContent = e.textContent })"

@pytest.mark.parametrize('scheme,rules,every', [('light', None, 1), ('dark', ['color-contrast'], 4)])      # dark pages differ from light ones in their colours only
def test_everybody_can_read_it(site, address, tab, axe, scheme, rules, every):
    tab.emulate_media(color_scheme=scheme)
    bad = {}
    for p in sorted(site.glob('*.html'))[::every]:
        tab.goto(address+p.name, wait_until='load')
        if p.name!=WHOLE: tab.evaluate(PLAIN)
        tab.evaluate(axe); tab.evaluate('document.fonts.ready.then(() => null)')
        if found := [v for v in tab.evaluate(CHECK, rules) if v[0]!='image-alt']: bad[p.name] = found     # they have a test of their own
    tab.emulate_media(color_scheme='light')
    assert bad=={}

@pytest.mark.parametrize('query,wanted', [
    ('blockwise', 'masks.html'), ('relative position bias', 'attention.html'), ('codebook', 'tokenizers.html'), ('leak test', 'mim.html'),
    ('layer decay', 'finetune.html'), ('linear probe', 'probes.html'), ('windows', 'mixmim_encoder.html'),
    ('block_mask', 'masks.html#block_mask'), ('patchify', 'patches.html#patchify'), ('load_official', 'checkpoints.html#load_official'),
    ('attntion distence', 'attention_heads.html')])
def test_search(address, tab, query, wanted):
    if '/index.html' not in tab.url: tab.goto(address+'index.html')
    tab.locator('.smalldocs-search input').fill(query)
    tab.locator('.search-result').first.wait_for(); tab.wait_for_timeout(200)
    first,*more = [a.get_attribute('href') for a in tab.locator('.search-result').all()[:3]]
    assert wanted in first or ('#' not in wanted and wanted in ' '.join(more) and 'glossary' in first)

def background(tab): return tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).reduce((a, b) => +a + +b)")

def test_dark_mode_switches_and_stays(address, tab):
    tab.goto(address+'masks.html')
    assert background(tab)>700
    tab.locator('.quarto-color-scheme-toggle').click(); tab.wait_for_timeout(200)
    assert background(tab)<200
    tab.goto(address+'patches.html')
    assert background(tab)<200
    tab.locator('.quarto-color-scheme-toggle').click(); tab.wait_for_timeout(200)
    assert background(tab)>700

def test_code_is_copied(address, tab):
    tab.goto(address+'masks.html')
    block = tab.locator('.code-copy-outer-scaffold').filter(has_text='def random_order').first
    block.hover(); block.locator('.code-copy-button').click()
    assert tab.evaluate('navigator.clipboard.readText()').strip()==block.locator('code').inner_text().strip()

def test_source_and_parameters_fold(address, tab):
    tab.goto(address+'masks.html')
    source,params = tab.locator('details.code-fold').first,tab.locator('details.parameters').first
    assert source.locator('pre').is_visible() and not params.locator('table').is_visible()
    source.locator('summary').click(); params.locator('summary').click()
    assert not source.locator('pre').is_visible() and params.locator('table').is_visible()

def test_symbols_chapters_and_sections_are_linked(address, tab):
    tab.goto(address+'beit.html')
    tab.locator('main a[href$="masks.html#block_mask"]').first.click()
    tab.wait_for_url('**/masks.html#block_mask')
    tab.wait_for_function("() => { const y = document.getElementById('block_mask').getBoundingClientRect().y; return y > 0 && y < window.innerHeight }")
    assert tab.locator('#TOC a').count()>=tab.locator('main h2').count()>5
    before,after = tab.locator('.nav-page-previous a'),tab.locator('.nav-page-next a')
    assert before.count()==after.count()==1
    after.click(); tab.wait_for_url(lambda u: 'masks' not in u)
    tab.locator('.nav-page-previous a').click(); tab.wait_for_url('**/masks.html')

def test_what_scrolls_can_be_reached_by_keys(address, tab):
    tab.goto(address+'masks.html', wait_until='load')
    assert tab.locator('pre[tabindex="0"]').count()>0
    assert tab.evaluate("[...document.querySelectorAll('pre')].every(e => (e.scrollWidth > e.clientWidth) == e.hasAttribute('tabindex'))")

def move(tab, name, value): tab.locator(f'#playground [name={name}]').evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})) }", str(value))

BLUE = """() => { const c = document.querySelector('#playground canvas'), d = c.getContext('2d').getImageData(0, 0, 28, 28).data
    return [...Array(784).keys()].filter(i => d[4*i] == 0 && d[4*i+1] == 114 && d[4*i+2] == 178).length }"""

def test_playground_draws_what_the_sliders_say(address, tab):
    tab.goto(address+'playground.html')
    tab.locator('#playground select[name=method]').select_option('random')
    for percent,hidden in ((75, 37), (30, 15)):
        move(tab, 'ratio', percent)
        assert f'{hidden} of 49' in tab.locator('#playground .said').inner_text()
    tab.locator('#playground select[name=method]').select_option('blocks')
    for percent in (20, 60):
        move(tab, 'ratio', percent)
        assert int(tab.locator('#playground .said').inner_text().split()[0])*16==tab.evaluate(BLUE)>0
    drawn = tab.locator('#playground canvas').first.evaluate('c => c.toDataURL()')
    tab.locator('#playground button').click()
    assert drawn!=tab.locator('#playground canvas').first.evaluate('c => c.toDataURL()')
