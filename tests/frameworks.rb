# A web server for what the docs show of Rails: its model, its controller and its view, with the real ActiveRecord.
# Arguments: a port. In the current folder: order.rb, orders_controller.rb, index.html.erb.
require "active_record"
require "erb"
require "json"
require "socket"

parts = JSON.parse(ENV.fetch("CONNECTION"))
ActiveRecord::Base.establish_connection(adapter: "postgresql", **parts.transform_keys(&:to_sym))
class ApplicationRecord < ActiveRecord::Base
  self.abstract_class = true
end
class ApplicationController
  include ERB::Util
  def render = ERB.new(File.read("index.html.erb"), trim_mode: "<>").result(binding)
end
require "./order"
require "./orders_controller"

HEAD = "<!doctype html><script src=/turbo.js></script><body>"
server = TCPServer.new("127.0.0.1", Integer(ARGV[0]))
loop do
  client = server.accept
  _, path = client.gets&.split
  next client.close unless path
  nil while (line = client.gets) && line != "\r\n"
  if (state = path[%r{\A/state/(.*)}, 1])
    Order.find(7).update!(state: state)
  else
    (controller = OrdersController.new).index
    body = HEAD + controller.render
  end
  client.write("HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\nContent-Length: #{body.to_s.bytesize}\r\n\r\n#{body}")
  client.close
end
