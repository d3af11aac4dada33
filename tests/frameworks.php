<?php
// A router for PHP's web server, for what the docs show of Laravel: its route and its view, with the real
// Illuminate\Database, and of Blade what the view needs. Beside it: web.php, orders.blade.php.
namespace Illuminate\Support\Facades {
    class Route
    {
        public static function get(string $path, callable $answer): void
        {
            echo $answer();
        }
    }
}

namespace {
    require 'Illuminate/Database/autoload.php';
    $parts = json_decode(getenv('CONNECTION'), true);
    $capsule = new Illuminate\Database\Capsule\Manager;
    $capsule->addConnection([
        'driver' => 'pgsql', 'charset' => 'utf8', 'host' => $parts['host'], 'port' => $parts['port'],
        'database' => $parts['dbname'], 'username' => $parts['user'], 'password' => $parts['password'],
    ]);
    $app = new Illuminate\Container\Container;
    $app->instance('db', $capsule->getDatabaseManager());
    Illuminate\Support\Facades\Facade::setFacadeApplication($app);

    function view(string $name, array $values)
    {
        return new class ($name, $values) {
            public function __construct(private string $name, private array $values)
            {
            }

            public function render(): string
            {
                $rules = ['/\{\{--.*?--\}\}/s' => '', '/\{\{ (.*?) \}\}/' => '<?= htmlspecialchars($1) ?>',
                    '/@foreach (\(.*\))$/m' => '<?php foreach $1: ?>', '/@endforeach/' => '<?php endforeach ?>'];
                $blade = file_get_contents("{$this->name}.blade.php");
                extract($this->values);
                ob_start();
                eval('?>' . preg_replace(array_keys($rules), array_values($rules), $blade));
                return ob_get_clean();
            }
        };
    }

    header('Content-Type: text/html');
    if (preg_match('~^/state/(.*)~', $_SERVER['REQUEST_URI'], $found)) {
        Illuminate\Support\Facades\DB::transaction(function () use ($found) {
            Illuminate\Support\Facades\DB::update('UPDATE orders SET state = ? WHERE id = 7', [$found[1]]);
            $data = json_encode(['id' => 7, 'state' => $found[1]]);
            Illuminate\Support\Facades\DB::select('SELECT sse_relay.publish(?, ?)', ['orders', $data]);
        });
    } else {
        require 'web.php';
    }
}
